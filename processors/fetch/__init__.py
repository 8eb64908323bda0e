"""Sources of media: local files and HTTP, with checks against SSRF and path traversal."""
