"""Makes tests/helpers.py importable (pytest puts this file's folder on the path)."""
