"""The page that `ldm app` serves; modules without gradio do the work, `page`, `workspace` and `tab*` show it."""
