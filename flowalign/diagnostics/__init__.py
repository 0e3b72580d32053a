"""Measurements of a configuration before it is trained: the doctor (can it train?), the benchmark (what does sharing
save?), and the measuring tools that both use.
"""
