"""Presentation of a run: `history` reads its rank records, `layout` sorts modules into layers and
kinds; `ranks` and `sparsity` are tables, `rank_json` is JSON, `plots` makes pictures and pages.

Only `plots` and its panels import matplotlib, so that `lorakit inspect-ranks` answers at once.
"""
