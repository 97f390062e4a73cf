"""Where a network runs, and in which numbers: names become torch's own."""

from __future__ import annotations

import torch

from packcache.errors import InvalidSetting

__all__ = ["DTYPES", "as_device", "as_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by name or as torch's own. Raises InvalidSetting."""
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or known not in DTYPES.values():
        raise InvalidSetting(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    return known


def as_device(device: str | torch.device) -> torch.device:
    """cpu, cuda or cuda:N, by name or as torch's own. Raises InvalidSetting."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InvalidSetting(f"device is {device!r}, expected cpu, cuda or cuda:N") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidSetting(
            f"device is {device}, but torch sees {torch.cuda.device_count()} CUDA devices here: "
            "choose cpu or another device"
        )
    return place
