"""Models to benchmark that no package carries, as `llmopt bench bench/models.py:bert_base`: architectures with seeded random weights."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel


def bert_base() -> BertModel:
    """BERT-base: 12 layers, hidden 768, 12 heads, FFN 3072."""
    torch.manual_seed(0)
    return BertModel(BertConfig())
