"""Ray: the only package that imports it. Plain classes become actors here, and pools satisfy their protocols."""
