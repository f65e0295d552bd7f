"""Failures these tests catch: a prediction that a GPU's own count of the same training contradicts."""

import pytest
import torch

pytest.importorskip("transformers", reason="plans are of transformers models")

SIZES = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}
BATCH, SEQ = 4, 512


def most_bytes(optimizer_of, fused):
    """That tensors took in bfloat16 training with activations checkpointed, and the model's own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from grass.activation_checkpointing import checkpoint_activations
    from grass.layers import LayerMap

    device = torch.device("cuda")
    warm = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    warm @ warm  # cuBLAS takes its workspace, which no plan counts
    before = torch.cuda.memory_allocated()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).to(device, torch.bfloat16).train()
    checkpoint_activations(model, LayerMap.from_model(model) if fused else None)
    optimizer = optimizer_of(model)
    ids = torch.zeros(BATCH, SEQ, dtype=torch.int64, device=device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("full", None),
        ("grass", {}),
        ("grass-streamed", {"offload": "streamed"}),
        ("grass-streamed-fused", {"offload": "streamed", "fused_backward": True}),
    ],
)
def test_a_gpu_counts_what_was_predicted(method, config, tmp_path):
    from transformers import LlamaConfig

    import grass
    from grass.plan.prediction import GIBIBYTE, Case, predict

    def optimizer_of(model):
        if config is None:
            return torch.optim.AdamW(model.parameters(), fused=True)
        # all layers are active, so that the sets that are drawn are those of the plan
        settings = grass.GrassConfig(active_layers=4, sampler="cyclic", buffer_mb=8, **config)
        return grass.GrassAdamW(model, lr=1e-5, config=settings)

    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    case = Case(str(tmp_path), batch=BATCH, seq=SEQ, loss="full", active_layers=4, buffer_mb=8)
    (row,) = predict(case, [method])
    measured = most_bytes(optimizer_of, fused="fused" in method)
    assert row.peak_gib * GIBIBYTE == pytest.approx(measured, rel=0.03)
