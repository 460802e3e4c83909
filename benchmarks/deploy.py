"""How fast sub-networks run: PyTorch, torch.compile, the ONNX export in ONNX Runtime and in OpenVINO (on a CPU), at
several shares of the MACs, all timed in turns. Random weights; prints a Markdown table for each batch size."""

import tempfile
from pathlib import Path

import common
import torch

import utils
from models.subnet import export, latency
from models.subnet.store import subnet_config
from models.vit.pretrained import ModelSpec, image_shape

SHARES = {"1": 1, "1/2": 0.5, "1/3": 1 / 3}


def openvino_network(path):
    """An ONNX file as something to call with images [B, 3, h, w], by OpenVINO in float32."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def runtimes(subnet, config, folder, device):
    """{name: one network in several runtimes}."""
    found = {"PyTorch": subnet.to(device), "torch.compile": torch.compile(subnet, fullgraph=True)}
    if device.type == "cpu":
        export.save(subnet, config, folder, ["onnx"])
        found["ONNX Runtime"] = export.OnnxNetwork(folder / export.ONNX_NAME)
        found["OpenVINO"] = openvino_network(folder / export.ONNX_NAME)
    return found


@torch.inference_mode()
def largest_difference(networks, device):
    """Of the networks' logits from those of the first, relative to its largest."""
    images = torch.randn(2, *image_shape(networks[0]), device=device)
    logits = [network(images) for network in networks]
    return max(((other - logits[0]).abs().max() / logits[0].abs().max()).item() for other in logits)


def main(args):
    torch.set_num_threads(args.threads)
    device = utils.choose_device(args.device, "--device")
    supernet, costs, table = common.random_table(args.model)
    many = common.at_shares(table, costs, SHARES.values())
    with tempfile.TemporaryDirectory() as folder:
        networks = []
        for share, (widths, subnet) in enumerate(zip(many, common.cut(supernet, many), strict=True)):
            config = subnet_config(subnet, ModelSpec(args.model, 1000), widths, costs)
            networks.append(runtimes(subnet, config, Path(folder) / str(share), device))
        worst = max(largest_difference(list(found.values()), device) for found in networks)
        print(f"logits differ from PyTorch's by at most {worst:.0e} of the largest")
        for batch in args.batch_sizes:
            torch.compiler.reset()  # there is a limit to how many shapes one class of network is compiled for
            conditions = latency.Conditions.of(supernet, device, batch, "none")
            flat = [network for found in networks for network in found.values()]
            figures = iter(latency.measure(flat, device, conditions))
            columns = [{name: next(figures) for name in found} for found in networks]
            whole = columns[0]["PyTorch"]
            print(f"\n{args.model}, {conditions}; times as fast as all of it in PyTorch ({whole:.1f} ms)\n")
            head = ["", *(f"{share} of the MACs" for share in SHARES)]
            rows = [[name, *(f"{whole / column[name]:.2f}" for column in columns)] for name in columns[0]]
            print("\n".join(common.markdown(head, rows)))


if __name__ == "__main__":
    flags = {"model": "vit_small", "threads": 1, "batch_sizes": [1, 8], "device": "cpu"}
    utils.run_stage(main, common.arguments(__doc__, **flags))
