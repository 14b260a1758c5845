"""The `flexjax` command; see `flexjax.cli.main`."""
