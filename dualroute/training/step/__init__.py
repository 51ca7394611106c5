"""What happens between two optimizer steps: module, losses, optimizer, guards."""
