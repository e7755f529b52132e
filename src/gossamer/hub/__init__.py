"""Thin translators to other libraries, each optional and imported only when that library is in use."""
