"""torch's multi-tensor operations under public names.

One call works through a list of tensors: a single kernel for many tensors on a GPU, one Python call instead of many on
a CPU. torch's own optimizers are built on them; only their names are private.
"""

from __future__ import annotations

from torch import _foreach_add as add
from torch import _foreach_add_ as add_
from torch import _foreach_addcdiv_ as addcdiv_
from torch import _foreach_addcmul_ as addcmul_
from torch import _foreach_div as div
from torch import _foreach_lerp as lerp
from torch import _foreach_lerp_ as lerp_
from torch import _foreach_mul as mul
from torch import _foreach_mul_ as mul_
from torch import _foreach_norm as norm
from torch import _foreach_sqrt as sqrt

__all__ = ["add", "add_", "addcdiv_", "addcmul_", "div", "lerp", "lerp_", "mul", "mul_", "norm", "sqrt"]
