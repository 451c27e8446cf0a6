"""Compact models for inference: without dead nodes, with the same outputs, ready for export and for files."""

from __future__ import annotations

from dnw_graph.compaction.exports import export
from dnw_graph.compaction.files import load_compact, save_compact
from dnw_graph.compaction.model import PRODUCTS, CompactModel, compact
from dnw_graph.compaction.report import Report, Size

__all__ = ["PRODUCTS", "CompactModel", "Report", "Size", "compact", "export", "load_compact", "save_compact"]
