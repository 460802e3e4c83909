"""torchrun for the stages, with torchrun's options: python tools/launch.py --nproc-per-node=8 main_train.py ...

Signals go to the ranks, which save and end by themselves, and torchrun adds nothing to what the ranks say. Ends with
the exit code of the first rank that failed, with 75 if the ranks were told to stop, or else with 0.
"""

import signal

# Before the slow imports. The ranks inherit it: signals that come before they are ready wait for them.
SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has background processes ignore it

import logging
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOPPED, STOPPED_FILE = 75, "SKD_STOPPED_FILE"  # as in utils.py, which takes seconds to import


def pass_signals_on():
    """Send each signal that this process gets to its ranks. Without any there is nothing to save."""
    while True:
        number = signal.sigwait(SIGNALS)
        ranks = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
        if not ranks:
            os._exit(STOPPED)
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def main():
    arguments = run.parse_args(sys.argv[1:])
    logging.disable(logging.ERROR)
    threading.Thread(target=pass_signals_on, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STOPPED_FILE] = stopped = f"{folder}/stopped"
        code = 0
        try:
            run.run(arguments)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            code = failure.exitcode
            if code < 0:
                name = signal.Signals(-code).name
                print(f"error: rank {number}, process {failure.pid}, was ended by {name}", file=sys.stderr)
                code = 128 - code
        code = STOPPED if os.path.exists(stopped) else code
    sys.exit(code)


if __name__ == "__main__":
    main()
