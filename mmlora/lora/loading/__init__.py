"""Loading of PEFT files into validated adapter weights."""
