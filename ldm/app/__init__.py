"""The pages for a browser, and the parts of them that need none."""
