"""From rows of a table, an image or a recording to packed windows.

rows → encode → examples → packing → module.
"""
