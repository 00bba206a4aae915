"""The config's section `train`: how long, in which batches and by which optimizer, and what happens on the way."""

from typing import Annotated, Literal

from pydantic import Field

from olora_ray.config.field_types import Folder, Fraction, PositiveInt
from olora_ray.config.section import Section


class Train(Section):
    """Length, batches, optimizer, evaluations and checkpoints of the training."""

    epochs: Annotated[float, Field(gt=0.0)] = 1
    """Passes over the training sequences."""
    steps: PositiveInt | None = None
    """Train this many optimizer steps instead of `epochs`."""
    global_batch: PositiveInt = 16
    """Sequences (packs) per optimizer step, over all workers."""
    micro_batch: PositiveInt = 4
    """Sequences that a worker runs through the model at once; a smaller number needs less memory, and feeds more
    workers: each takes whole micro-batches."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Run each block again in the backward pass instead of keeping what it computed: less memory, up to half more
    time, the same result. auto: where a step would not fit in the memory of the workers otherwise."""
    lr: Annotated[float, Field(gt=0.0)] = 3.0e-4
    """Peak learning rate of AdamW."""
    lr_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of B divided by that of A, which is `lr` (LoRA+, arXiv 2402.12354, has 16); 1: one for both."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: Fraction = 0.03
    """Share of the steps at the start in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay; it pulls the adapter back to its initial values."""
    precondition: bool = False
    """Multiply the gradient of A by (B^T B)^-1 and that of B by (A A^T)^-1, each scaled to length 1, before clipping
    (as NoRA+, arXiv 2410.18965, and Riemannian preconditioned LoRA, 2402.02347)."""
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    eval_every: PositiveInt = 50
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; the start and the last step always have one."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep, the newest; each also holds the best adapter so far."""
    early_stop: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better held-out loss; null: never."""
    log_every: PositiveInt = 10
    """Steps between progress lines."""
    start: Folder | None = None
    """Checkpoint folder of a run with the same base and adapter settings: training starts from its best adapter."""

    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all workers."""
        return -(-self.global_batch // self.micro_batch)
