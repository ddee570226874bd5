"""What happens at the door: malformed requests, overload, clients that leave, hours of traffic."""
