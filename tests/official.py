"""Random state dicts with the names and shapes of the official models, written down as facts."""

import torch

V, SV, D, H, FFN, LAYERS, HEADS, TIME, POSITIONS, LONGEST = 13, 11, 6, 8, 32, 2, 2, 10, 12, 9


def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, size: int = H) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def bert_layer(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part in ("query", "key", "value"):
        shapes |= linear(f"{name}.attention.self.{part}", H, H)
    return shapes | {
        **linear(f"{name}.attention.output.dense", H, H), **norm(f"{name}.attention.output.LayerNorm"),
        **linear(f"{name}.intermediate.dense", FFN, H), **linear(f"{name}.output.dense", H, FFN),
        **norm(f"{name}.output.LayerNorm")}


def ar_diffusion(injection: str = "txl", predict: bool = False, self_condition: bool = False) -> dict[str, torch.Tensor]:
    """A random state dict with the official names of AR-Diffusion."""
    shapes = {
        "encoder.embeddings.word_embeddings.weight": (SV, H),
        "encoder.embeddings.position_embeddings.weight": (POSITIONS, H),
        "encoder.embeddings.token_type_embeddings.weight": (2, H), **norm("encoder.embeddings.LayerNorm"),
        **linear("encoder.pooler.dense", H, H),
        **linear("input_up_proj.0", 2 * H, D * (2 if self_condition else 1)), **linear("input_up_proj.2", H, 2 * H),
        **linear("output_down_proj.0", 2 * H, H), **linear("output_down_proj.2", D, 2 * H),
        "word_embedding.weight": (V, D), "lm_head.bias": (V,), "position_embeddings.weight": (POSITIONS, H),
        **norm("LayerNorm")}
    for i in range(LAYERS):
        shapes |= bert_layer(f"encoder.encoder.layer.{i}")
        block = f"transformer_blocks.{i}"
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v"):
                shapes |= linear(f"{block}.{attention}.{part}", H, H, bias=False)
            shapes |= linear(f"{block}.{attention}.to_out.0", H, H)
        shapes |= {**norm(f"{block}.norm1"), **norm(f"{block}.norm2"), **norm(f"{block}.norm3"),
                   **linear(f"{block}.ff.net.0.proj", 8 * H, H), **linear(f"{block}.ff.net.2", H, 4 * H)}
        if injection != "add":
            shapes |= {**linear(f"{block}.time_trans.0", 4 * TIME, TIME), **linear(f"{block}.time_trans.2", H, 4 * TIME)}
        if injection == "txl":
            shapes |= {f"{block}.r_w_bias": (HEADS, H // HEADS), f"{block}.r_r_bias": (HEADS, H // HEADS)}
    if injection == "add":
        shapes |= {**linear("time_trans.0", 4 * TIME, TIME), **linear("time_trans.2", H, 4 * TIME)}
    if predict:
        shapes["length_embedding.weight"] = (LONGEST + 1, H)
    state = random_tensors(shapes)
    return state | {"lm_head.weight": state["word_embedding.weight"], "position_ids": torch.arange(POSITIONS)[None],
                    "encoder.embeddings.position_ids": torch.arange(POSITIONS)[None]}


def diffuseq(latent: int = D) -> dict[str, torch.Tensor]:
    """A random state dict with the official names of DiffuSeq; no projections where ``latent`` is the hidden size."""
    shapes = {
        "word_embedding.weight": (V, latent), "lm_head.bias": (V,), "position_embeddings.weight": (POSITIONS, H),
        **norm("LayerNorm"), **linear("time_embed.0", 4 * TIME, TIME), **linear("time_embed.2", H, 4 * TIME)}
    if latent != H:
        shapes |= {**linear("input_up_proj.0", H, latent), **linear("input_up_proj.2", H, H),
                   **linear("output_down_proj.0", H, H), **linear("output_down_proj.2", latent, H)}
    for i in range(LAYERS):
        shapes |= bert_layer(f"input_transformers.layer.{i}")
    state = random_tensors(shapes)
    return state | {"lm_head.weight": state["word_embedding.weight"], "position_ids": torch.arange(POSITIONS)[None]}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draw) * (0.5 if len(shape) > 1 else 1.0) for name, shape in shapes.items()}
