"""A folder for PYTHONPATH: Python imports the `sitecustomize` in it when it starts.

Nothing here is imported by the package.
"""
