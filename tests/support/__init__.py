"""Helpers of more than one test file.

Imported by its full name, so that no folder or package of the same name comes before it.
"""
