"""Keys of base.yaml, which `pretrain` takes; in the names of karpathy/nanochat where it has them."""

from dataclasses import dataclass

SHAPE_KEYS = ("generation", "depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "total_batch_size")


@dataclass
class PretrainConfig:
    """Keys of base.yaml. An empty value means the default of the model's generation (scaling.DEFAULTS)."""

    depth: int = 12
    """Number of layers; everything that is not set follows from it."""
    generation: int = 2
    """Architecture and hyperparameters: 2 (2026) or 1 (October 2025)."""
    aspect_ratio: int = 64
    """Width of the model per layer."""
    head_dim: int = 128
    """Channels of an attention head; the width is rounded up to whole heads."""
    max_seq_len: int = 2048
    """Tokens per sequence."""
    window_pattern: str | None = None
    """Attention tiled over the layers: S sliding window of a quarter of the sequence, L full."""
    num_iterations: int = -1
    """Optimizer steps; -1: from target_flops or the ratio."""
    target_flops: float = -1
    """Training FLOPs; -1: from the ratio."""
    target_param_data_ratio: float | None = None
    """Tokens per parameter (generation 2: of matrices and head)."""
    device_batch_size: int = -1
    """Sequences per micro-batch on each device; -1: as free memory allows."""
    total_batch_size: int = -1
    """Tokens per optimizer step, over all devices; -1: from the depth."""
    embedding_lr: float | None = None
    """AdamW learning rate of the embedding at width 768 and the reference batch size; the next three likewise."""
    unembedding_lr: float | None = None
    """AdamW learning rate of the head."""
    matrix_lr: float | None = None
    """Muon learning rate of the matrices."""
    scalar_lr: float | None = None
    """AdamW learning rate of the per-layer scalars."""
    weight_decay: float | None = None
    """Cautious weight decay of the matrices at the reference depth and batch size."""
    warmup_steps: int | None = None
    """Steps of linear learning-rate warmup."""
    warmdown_ratio: float | None = None
    """Fraction of the steps, at the end, of linear learning-rate decay."""
    final_lr_frac: float | None = None
    """Final learning rate as a fraction of the peak."""
    eval_every: int = 250
    """Steps between evaluations of validation bits per byte; -1: only at the end, 0: never."""
    eval_tokens: int = 80 * 524288
    """Tokens of validation text per evaluation."""
    core_metric_every: int = -1
    """Steps between evaluations of CORE; -1: never."""
    core_metric_max_per_task: int = 500
    """Examples of each CORE task in such an evaluation."""
    sample_every: int = 2000
    """Steps between text samples; -1: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints; -1: only when the run is interrupted."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk during the run."""
    save_optimizer: bool = False
    """Write the optimizer state to optimizer.pt, from which SFT can start (d24: 4 GB)."""
    push_every: int = -1
    """Steps between uploads to the Hub, where the caller can upload; -1: never."""
    fp8: str = False
    """FP8 matmuls (E4M3 forward, E5M2 gradients): true, false, or auto: on GPUs that have them (H100 and newer)."""
    dataset: str = "primer"
    """Training text: a Hub id, a folder of parquet files, a .jsonl file or `primer`; or a weighted mixture of them:
    [{dataset: ..., weight: 0.5}, ...] (data/documents.py)."""
    skip_bad_files: bool = False
    """Skip files that cannot be read instead of stopping."""
    seed: int = 0
    """Seed of the weights and of the data order after the first epoch."""
    compile: bool = True
    """Compile with torch.compile (CUDA only)."""
    attn_implementation: str = "auto"
    """auto: this project's fused step; else the model's own forward with that attention of transformers."""
    max_loss_spike: float = 2.0
    """Nats above the median of the last steps at which a loss stops the run (LossSpikeDetector); 0: never."""
    log_every: int = -1
    """Steps between log lines, 1 for every step; -1: progress bar only."""
    report_to: str = "none"
    """Tracker: none, trackio, wandb, tensorboard."""

    def __post_init__(self):
        self.fp8 = {"true": True, "false": False}.get(str(self.fp8).lower(), self.fp8)  # flags are text, YAML has both
