"""Life cycle of adapters: manager, host cache and registry file."""
