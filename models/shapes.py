"""Names and shapes of a GPT-2's weights."""

from .config import GPT2Config


def weight_shapes(config: GPT2Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that the configuration asks for; matrices are [in, out] as in Conv1D."""
    width, inner = config.n_embd, config.inner_size
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
    }
    for layer in range(config.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes
