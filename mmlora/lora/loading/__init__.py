"""From PEFT files to checked adapter weights."""
