"""What a point holds, read without running its code and without the appliance's kernel mounting it."""
