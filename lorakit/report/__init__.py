"""Presentation of a run to a person: `history` reads its rank records, `layout` sorts modules into layers and kinds, `ranks`
makes tables and JSON, `plots` makes pictures.

Nothing here imports torch or transformers, and only `plots` imports matplotlib: `lorakit inspect-ranks` answers at once.
"""
