"""fastofa's performance-critical functions. They can be used alone and depend only on torch (and Triton).

from fastofa.kernels import crop_resize, depthwise_conv3x3, distillation_loss, ofa_loss
"""

from fastofa.kernels.crop_resize import crop_resize
from fastofa.kernels.depthwise import depthwise_conv3x3
from fastofa.kernels.gelu import bias_gelu
from fastofa.kernels.layer_norm import layer_norm
from fastofa.kernels.norm_act import channel_statistics, norm_act, norm_act_pool
from fastofa.kernels.ofa_loss import distillation_loss, ofa_loss
from fastofa.kernels.stem_conv import stem_conv2d, stem_conv2d_with_statistics

__all__ = [
    "bias_gelu",
    "channel_statistics",
    "crop_resize",
    "depthwise_conv3x3",
    "distillation_loss",
    "layer_norm",
    "norm_act",
    "norm_act_pool",
    "ofa_loss",
    "stem_conv2d",
    "stem_conv2d_with_statistics",
]
