"""Compiled operations for the papers on sparsity; each folder is one op with a plain torch twin."""
