"""What bitsandbytes offers no public way for."""

from __future__ import annotations

from typing import Any

import torch


def recycling(paged: type) -> type:
    """A paged optimizer class of bitsandbytes that reuses the memory of finished trials in this process.

    bitsandbytes frees no paged memory, a quarter of a GiB a trial at Hulu-Med-4B's size, and has no setting for that.
    So its page manager (`page_mng`) and the marks on its tensors (`is_paged`, `page_deviceid`), which it does not
    document, are used here.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        paged.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.free = sorted(self.page_mng.paged_tensors, key=torch.Tensor.numel)

    def get_state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        reused = next((one for one in self.free if one.dtype == dtype and one.numel() >= p.numel()), None)
        if reused is None or p.device.type == "cpu":
            return paged.get_state_buffer(self, p, dtype)  # type: ignore[attr-defined]
        self.free = [one for one in self.free if one is not reused]
        buffer = reused.view(-1)[: p.numel()].view(p.shape).zero_()
        buffer.is_paged, buffer.page_deviceid = True, reused.page_deviceid  # type: ignore[attr-defined]
        return buffer

    return type(paged.__name__, (paged,), {"__init__": __init__, "get_state_buffer": get_state_buffer})
