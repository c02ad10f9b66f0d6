"""Programs that measure. A package, or one of that name in site-packages would be imported."""
