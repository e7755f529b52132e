"""A small Llama over bytes, its text, its training loop and a chart: what pretrain_24.py runs."""
