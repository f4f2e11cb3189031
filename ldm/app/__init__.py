"""The page that `ldm app` serves; modules without gradio do the work, `page`, `controls` and `tab_*` show it."""
