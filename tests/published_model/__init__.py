"""The published InternVL-14B code as it is found by the names of its files, small.

Written from its description; no class of internvl_engine is used.
"""
