"""Measurements of a configuration that is not trained: the doctor (can it train?) and the benchmark (what does sharing
save?), and the measuring tools that both use.
"""
