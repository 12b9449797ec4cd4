"""The forms kernels are checked and timed in: operands on a device, every kernel that takes them, what PyTorch has for it, the truth.

One row for each op and scheme, in sizes of a Llama of 8 billion parameters, or small ones for a rehearsal. On the device "meta" a form has
shapes and no memory: what its kernels are compiled for.
"""

from __future__ import annotations

from bench.gpu.forms.attentions import ATTENTIONS
from bench.gpu.forms.linears import LINEARS
from bench.gpu.forms.rows import ROWS
from bench.gpu.forms.work import Form

FORMS: dict[str, Form] = {**LINEARS, **ATTENTIONS, **ROWS}
