"""Stages 3 and 4: sub-networks as networks of their own.

In: a super-network, a width table and a budget. Out: an ordinary timm network, and its files.
Here: budgets, extraction, latency, saving, exporting; load.py is for other projects.
"""

from models.subnet.store import load_supernet

__all__ = ["load_supernet"]
