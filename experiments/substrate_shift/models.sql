-- Simulated models to try the experiment with; apply it as often as you like. The third refuses every question.

insert into pgharness.models (name, description, provider, parameters)
values ('substrate/a', 'Simulated.', 'simulator', '{"latency_seconds": 0}'),
       ('substrate/b', 'Simulated.', 'simulator', '{"latency_seconds": 0}'),
       ('substrate/refuses', 'Simulated: refuses.', 'simulator', '{"latency_seconds": 0, "refusal_rate": 1}')
on conflict do nothing;
