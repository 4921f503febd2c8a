"""The keys of base.yaml, which `pretrain` takes.

Apart from the loop, because it is what users read: one line a key, in the names of karpathy/nanochat where it has one.
"""

from dataclasses import dataclass

SHAPE_KEYS = ("generation", "depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "total_batch_size")
PLAN_KEYS = (
    *SHAPE_KEYS, "num_iterations", "target_flops", "target_param_data_ratio", "embedding_lr", "unembedding_lr",
    "matrix_lr", "scalar_lr", "weight_decay", "warmup_steps", "warmdown_ratio", "final_lr_frac",
)  # fmt: skip


@dataclass
class PretrainConfig:
    """Keys of base.yaml. An empty value means the recipe of the model's generation (scaling.RECIPES)."""

    depth: int = 12
    """Number of layers: the one dial, from which all that is not given follows."""
    generation: int = 2
    """Architecture and recipe: 2 (2026) or 1 (October 2025)."""
    aspect_ratio: int = 64
    """Width of the model per layer."""
    head_dim: int = 128
    """Channels of an attention head; the width is rounded up to whole heads."""
    max_seq_len: int = 2048
    """Tokens in a row."""
    window_pattern: str | None = None
    """Attention windows tiled over the layers: S a quarter of the row, L all of it."""
    num_iterations: int = -1
    """Optimizer steps; -1: from target_flops or the ratio."""
    target_flops: float = -1
    """Training FLOPs; -1: from the ratio."""
    target_param_data_ratio: float | None = None
    """Tokens per parameter (generation 2: of matrices and head)."""
    device_batch_size: int = -1
    """Rows that a device takes at once; -1: as its memory allows."""
    total_batch_size: int = -1
    """Tokens of an optimizer step, over all devices; -1: from the depth."""
    embedding_lr: float | None = None
    """AdamW rate of the embedding at width 768 and the reference batch; as the next three, scaled from there."""
    unembedding_lr: float | None = None
    """AdamW rate of the head."""
    matrix_lr: float | None = None
    """Muon rate of the matrices."""
    scalar_lr: float | None = None
    """AdamW rate of the per-layer scalars."""
    weight_decay: float | None = None
    """Cautious weight decay of the matrices at the reference depth and batch."""
    warmup_steps: int | None = None
    """Steps in which the rates rise."""
    warmdown_ratio: float | None = None
    """Share of the steps, at the end, in which the rates fall."""
    final_lr_frac: float | None = None
    """Rates at the very end, as a share of the full ones."""
    eval_every: int = 250
    """Steps between measurements of validation bits per byte; -1: only at the end, 0: never."""
    eval_tokens: int = 80 * 524288
    """Tokens of validation text in a measurement."""
    core_metric_every: int = -1
    """Steps between measurements of CORE; -1: never."""
    core_metric_max_per_task: int = 500
    """Examples of each CORE task in such a measurement."""
    sample_every: int = 2000
    """Steps between text samples; -1: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints; -1: only when the run is interrupted."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk while the run goes on."""
    save_optimizer: bool = False
    """Keep the optimizer's state in optimizer.pt, for the SFT that begins with these momenta (a d24: 4 GB)."""
    push_every: int = -1
    """Steps between uploads to the Hub, when the caller gives a way to upload; -1: never."""
    fp8: str = False
    """FP8 matmuls (E4M3 forward, E5M2 gradients): true, false, or auto: where the GPU has them (H100 and newer)."""
    dataset: str = "primer"
    """Text to train on: a Hub id, a folder of parquet files, a .jsonl file or `primer`; or a list of them, mixed by
    weight: [{dataset: ..., weight: 0.5}, ...] (data/documents.py)."""
    skip_bad_files: bool = False
    """Go on without files that cannot be read, instead of stopping."""
    seed: int = 0
    """Seed of the weights and of the data's order after the first epoch."""
    compile: bool = True
    """Compile the network with torch.compile (CUDA only)."""
    attn_implementation: str = "auto"
    """auto: this project's fused step; else the model's own forward with that attention of transformers."""
    max_loss_spike: float = 2.0
    """Nats above the median of the last steps at which a loss stops the run (monitor.SpikeAlarm); 0: never."""
    log_every: int = -1
    """Steps between lines with a step's figures, 1 for each; -1: the bar only."""
    report_to: str = "none"
    """Where Accelerate reports to: none, trackio, wandb, tensorboard."""

    def __post_init__(self):
        self.fp8 = {"true": True, "false": False}.get(str(self.fp8).lower(), self.fp8)  # flags are text, YAML has both
