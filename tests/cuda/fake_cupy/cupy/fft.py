"""`cupy.fft`: array-api-compat wraps its functions when it is imported."""

from __future__ import annotations

from typing import Any


def _absent(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError("the fake has no Fourier transforms")


fft = ifft = fftn = ifftn = rfft = irfft = rfftn = irfftn = hfft = ihfft = _absent
fftfreq = rfftfreq = fftshift = ifftshift = _absent
