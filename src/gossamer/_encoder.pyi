"""
The int8 encoder over raw pointers; gossamer.encoder is the typed, checked way in.
"""
