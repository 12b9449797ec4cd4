"""Graphs on a GPU: which launches, with which buffers; running, printing and cross-compiling them. Imports triton only when used."""
