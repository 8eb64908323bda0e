"""Where media come from: data URLs, files and HTTP, within the limits of each."""
