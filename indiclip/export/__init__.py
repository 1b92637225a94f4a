"""The ways out: folders that other libraries open, each with a proof.

A target is one file, `to_<name>.py`, with a class `Target` after the contract in `target.py`; nothing registers it. It
says what an encoder would lose there, writes the folder, and opens it again with the other library's own classes, so
that `parity.py` can compare both sides. `source.py` and `fold.py` first bring an encoder to a form that other libraries
know: batch norm inside the projections, embeddings of one length.
"""
