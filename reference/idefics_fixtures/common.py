"""Paths, seeds and file formats that every writer shares.

All randomness comes from numpy generators seeded by a name, so that one writer's numbers do not move when another
writer changes, and no library's global state is involved.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SEED = 20230822
REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "fixtures"


def rng(name: str, seed: int = SEED) -> np.random.Generator:
    """A generator of its own for each name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}, path)


def write_json(path: Path, value) -> None:
    """One line per innermost list, so that the files stay readable and a diff shows the entry that changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_format(value, 0) + "\n", encoding="utf-8")


def _format(value, depth: int) -> str:
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    nested = isinstance(value, (dict, list)) and any(isinstance(item, (dict, list)) for item in _items(value))
    if len(flat) <= 110 - 2 * depth or not (nested or isinstance(value, dict)):
        return flat
    inner = "  " * (depth + 1)
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_format(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"
    rows = [f"{inner}{_format(item, depth + 1)}" for item in value]
    return "[\n" + ",\n".join(rows) + "\n" + "  " * depth + "]"


def _items(value):
    return value.values() if isinstance(value, dict) else value


def shortest(value) -> float | str | None:
    """A float32 as the shortest decimal that reads back as the same float32.

    JSON has no infinities: they become the strings "inf" and "-inf", NaN becomes "nan".
    """
    value = np.float32(value)
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return float(str(value))


def floats(tensor) -> list:
    return [shortest(value) for value in torch.as_tensor(tensor).flatten().tolist()]
