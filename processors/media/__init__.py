"""Media items: recognizing, decoding and checking audio and images."""
