"""The hot mathematics of fastofa, usable without the rest of it: depends on torch (and Triton) only.

from fastofa.kernels import crop_resize, depthwise_conv3x3, distillation_loss, ofa_loss
"""

from fastofa.kernels.crop_resize import crop_resize
from fastofa.kernels.depthwise import depthwise_conv3x3
from fastofa.kernels.ofa_loss import distillation_loss, ofa_loss

__all__ = ["crop_resize", "depthwise_conv3x3", "distillation_loss", "ofa_loss"]
