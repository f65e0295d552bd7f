"""What more than one test file uses.

Imported by its full name, so that no folder or package of the same name comes before it.
"""
