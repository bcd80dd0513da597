"""The models of the official OFA-KD code that timm does not have, recognised by name or by weights, for error messages.

Source: custom_model/cycle_mlp.py, hire_mlp.py and vip.py of https://github.com/Hao840/OFAKD. All its other models are
in timm, except Swin-Nano and Swin-Pico (`fastofa.models.timm_models.VARIANTS`).
"""

from collections.abc import Iterable

# Family: (start of its models' names without underscores, module that only its blocks have).
FAMILIES = {
    "CycleMLP": ("cyclemlp", ".attn.sfc_h."),
    "HireMLP": ("hiremlp", ".attn.mlp_h1."),
    "ViP": ("vip", ".attn.mlp_h."),
}


def family_of_name(name: str) -> str | None:
    """The family of a model's name, such as CycleMLP_B1, hire_mlp_small or vip_s7; None for all other names."""
    plain = name.lower().replace("_", "")
    return next((family for family, (start, _) in FAMILIES.items() if plain.startswith(start)), None)


def family_of_weights(names: Iterable[str]) -> str | None:
    """The family of a state_dict with these names of tensors; None for all other models."""
    text = "\n".join(names)
    return next((family for family, (_, module) in FAMILIES.items() if module in text), None)
