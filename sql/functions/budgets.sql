-- Budgets of runs, instances and projects: what was spent, how many calls may still begin, and what happens when there is no more.

create or replace function pgharness._run_budgets(run pgharness.runs) returns table (scope text, subject text, budget_usd numeric, spent_usd numeric)
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select 'run', (run).name, (run).budget_usd, _cost_usd(run) where (run).budget_usd is not null
    union all
    select 'instance', i.name, i.total_budget_usd, coalesce(s.spent_usd, 0)
      from instances as i left join instance_spending as s on s.instance_id = i.id
     where i.id = (run).instance_id and i.total_budget_usd is not null
    union all
    select 'project', p.name, p.budget_usd, coalesce(s.spent_usd, 0)
      from instances as i join projects as p on p.id = i.project_id left join project_spending as s on s.project_id = p.id
     where i.id = (run).instance_id and p.budget_usd is not null;
$$;
comment on function pgharness._run_budgets(pgharness.runs) is 'The budgets that a run has to keep to, and what is spent of each: its own, its instance''s, its project''s.';

create or replace function pgharness._set_budget_hint(scope text, subject text, budget_usd numeric, run_id bigint) returns text
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select case scope when 'run' then format('select pgharness.resume_run(%s, budget_usd => %s);', run_id, trim_scale(budget_usd))
                      else format('select pgharness.set_%s_budget(%L, %s);', scope, subject, trim_scale(budget_usd)) end;
$$;
comment on function pgharness._set_budget_hint(text, text, numeric, bigint) is 'What to type to raise a budget, after which the runs that it stopped go on.';

create or replace function pgharness._spent_reason(run pgharness.runs) returns text
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select format('%s is spent (%s USD); continue with: %s',
                  case b.scope when 'run' then format('the budget of %s USD', trim_scale(b.budget_usd))
                               else format('the budget of %s "%s", %s USD,', b.scope, b.subject, trim_scale(b.budget_usd)) end,
                  round(b.spent_usd, 4),
                  _set_budget_hint(b.scope, b.subject, greatest(b.budget_usd * 2, ceil(b.spent_usd * 150) / 100), (run).id))
      from _run_budgets(run) as b where b.spent_usd >= b.budget_usd limit 1;
$$;
comment on function pgharness._spent_reason(pgharness.runs) is 'Which of a run''s budgets is spent, and how to go on; null while none is.';

create or replace function pgharness._pause_if_spent(run pgharness.runs) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_reason text := _spent_reason(run);
begin
    if v_reason is null then
        return false;
    elsif (run).status = 'running' then
        perform _set_status((run).id, 'paused', v_reason);
    elsif starts_with((run).reason, 'the budget of ') then
        update runs as r set reason = v_reason where r.id = (run).id;      -- calls that were in flight have cost something, too
    end if;
    return true;
end;
$$;
comment on function pgharness._pause_if_spent(pgharness.runs) is
'Pause a running run if one of its budgets is spent, saying which and how to go on; of one that was paused so, say what is spent by now. The caller holds the run''s row lock.';

create or replace function pgharness._refuse_spent(run pgharness.runs) returns void
    language plpgsql stable security definer set search_path = pgharness, pg_temp
as $$
declare
    v_spent record;
    v_more  numeric;
begin
    select * into v_spent from _run_budgets(run) as b where b.spent_usd >= b.budget_usd and b.spent_usd > 0 limit 1;
    if found then
        v_more := round(v_spent.spent_usd * 2, 2) + 1;
        raise exception '% has spent % USD of its budget of % USD',
                        case v_spent.scope when 'run' then 'run ' || (run).id else format('%s "%s"', v_spent.scope, v_spent.subject) end,
                        round(v_spent.spent_usd, 4), trim_scale(v_spent.budget_usd)
            using errcode = 'PH006', hint = 'Raise it: ' || _set_budget_hint(v_spent.scope, v_spent.subject, v_more, (run).id);
    end if;
end;
$$;
comment on function pgharness._refuse_spent(pgharness.runs) is 'Raise PH006 if one of the budgets that a run has to keep to is spent.';

create or replace function pgharness._spend(runs bigint[], before numeric[]) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs;
begin
    -- rows are locked in the order of their ids, runs first: two groups never wait for each other
    insert into instance_spending as s (instance_id, spent_usd)
    select r.instance_id, sum(_cost_usd(r) - b.usd) from unnest(_spend.runs, before) as b (id, usd) join runs as r on r.id = b.id
     group by r.instance_id having sum(_cost_usd(r) - b.usd) > 0 order by r.instance_id
    on conflict on constraint instance_spending_pkey do update set spent_usd = s.spent_usd + excluded.spent_usd;
    if not found then
        return;
    end if;
    insert into project_spending as s (project_id, spent_usd)
    select i.project_id, sum(_cost_usd(r) - b.usd) from unnest(_spend.runs, before) as b (id, usd) join runs as r on r.id = b.id join instances as i on i.id = r.instance_id
     where i.project_id is not null group by i.project_id having sum(_cost_usd(r) - b.usd) > 0 order by i.project_id
    on conflict on constraint project_spending_pkey do update set spent_usd = s.spent_usd + excluded.spent_usd;
    for v_run in
        select r.* from runs as r join instances as i on i.id = r.instance_id left join projects as p on p.id = i.project_id
         where r.id = any (_spend.runs) and r.status = 'running' and (i.total_budget_usd is not null or p.budget_usd is not null) order by r.id
    loop
        perform _pause_if_spent(v_run);
    end loop;
end;
$$;
comment on function pgharness._spend(bigint[], numeric[]) is
'Count what runs have spent, beyond what they had before, on their instances and projects, and pause those of them whose instance or project has spent its budget. The caller holds the runs'' row locks.';

create or replace function pgharness._pause_spent_runs() returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs;
begin
    for v_run in
        select r.* from runs as r join instances as i on i.id = r.instance_id left join projects as p on p.id = i.project_id
         where r.status = 'running' and (i.total_budget_usd is not null or p.budget_usd is not null) order by r.id for no key update of r skip locked
    loop
        perform _pause_if_spent(v_run);
    end loop;
end;
$$;
comment on function pgharness._pause_spent_runs() is 'Pause running runs whose instance or project has spent its budget on other runs.';

create or replace function pgharness._is_budgeted(run pgharness.runs) returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select (run).budget_usd is not null
        or exists (select from instances as i left join projects as p on p.id = i.project_id
                    where i.id = (run).instance_id and (i.total_budget_usd is not null or p.budget_usd is not null));
$$;
comment on function pgharness._is_budgeted(pgharness.runs) is 'Whether a run has to keep to any budget.';

create or replace function pgharness._call_cap(run pgharness.runs) returns integer
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce((run).max_concurrency, case when _is_budgeted(run) then 1000000 end);
$$;
comment on function pgharness._call_cap(pgharness.runs) is
'How many calls of a run may be in flight: null if its workers need not ask. Those of a run with a budget do, for lease_run() says how many calls it can pay for.';

create or replace function pgharness._call_cost(run pgharness.runs) returns numeric
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    -- what the cache answers costs nothing, and a cheap model must not hide a dear one; a composite costs what its members do
    with latest as materialized (
        select c.run_id, c.kind, c.ordinal, c.attempt, c.model_id, c.outcome, c.cost_usd, c.parent_started_at from calls as c order by c.id desc limit 2000
    ), item as (
        select c.kind, max(c.model_id) filter (where c.parent_started_at is null) as model_id,
               sum(c.cost_usd) / nullif(count(*) filter (where c.parent_started_at is null and c.outcome <> 'cached'), 0) as usd
          from latest as c where c.run_id = (run).id group by c.kind, c.ordinal, c.attempt having sum(c.cost_usd) > 0
    )
    select coalesce((select max(of_model.usd) from (select avg(i.usd) as usd from item as i group by i.kind, i.model_id) as of_model),
                    greatest((run).note_cost_usd / nullif((run).notes_succeeded + (run).notes_failed, 0),
                             (run).grade_cost_usd / nullif((run).grades_succeeded + (run).grades_failed, 0)));
$$;
comment on function pgharness._call_cost(pgharness.runs) is
'About what another call of a run costs: the mean of its latest ones that cost anything, of the dearest of its models. Null while there are none.';

create or replace function pgharness._payable_calls(run pgharness.runs, worker_id bigint, in_use integer) returns integer
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    -- what is begun and not recorded is reserved, at the price of the calls before: as others last told, with what they were allowed then
    with call as materialized (select _call_cost(run) as usd)
    select min(case when b.spent_usd >= b.budget_usd then 0 when room.calls >= 1 or room.reserved > 0 then least(greatest(ceil(room.calls / room.sharers), 0), 1000000) else 1 end)::integer
      from _run_budgets(run) as b
     cross join call
     cross join lateral (
           select count(*) filter (where l.in_use + l.wanted > 0) + 1 as sharers, coalesce(sum(greatest(l.granted, l.in_use)), 0) as others
             from run_leases as l
             join workers as w on w.id = l.worker_id and w.status in ('running', 'draining')
             join runs as r on r.id = l.run_id
             join instances as i on i.id = r.instance_id
            where (l.run_id, l.worker_id) <> ((run).id, _payable_calls.worker_id)
              and case b.scope when 'run' then r.id = (run).id when 'instance' then r.instance_id = (run).instance_id
                       else i.project_id = (select x.project_id from instances as x where x.id = (run).instance_id) end) as lease
     cross join lateral (
           select floor((b.budget_usd - b.spent_usd) / call.usd) - lease.others - _payable_calls.in_use as calls, lease.sharers,
                  lease.others + _payable_calls.in_use as reserved) as room
     where b.spent_usd >= b.budget_usd or call.usd > 0;
$$;
comment on function pgharness._payable_calls(pgharness.runs, bigint, integer) is
'How many more calls of a run a worker may begin so that its budgets will not be exceeded, which has so many begun and not recorded; the last one may cost more than is left. Null without budgets, or while nothing is known of the costs.';

create or replace function pgharness.resume_spent(scope text, subject text) returns setof pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   runs;
    v_known record;
begin
    select i.total_budget_usd as budget_usd, s.spent_usd into v_known
      from instances as i left join instance_spending as s on s.instance_id = i.id where scope = 'instance' and i.name = subject
    union all
    select p.budget_usd, s.spent_usd from projects as p left join project_spending as s on s.project_id = p.id where scope = 'project' and p.name = subject;
    if v_known.budget_usd <= v_known.spent_usd then
        raise exception '% "%" has spent % USD, and its budget would be % USD', scope, subject, round(v_known.spent_usd, 4), trim_scale(v_known.budget_usd)
            using errcode = 'PH006', hint = 'Give it more: ' || _set_budget_hint(scope, subject, round(v_known.spent_usd * 2, 2) + 1, null);
    end if;
    for v_run in
        select r.* from runs as r join instances as i on i.id = r.instance_id left join projects as p on p.id = i.project_id
         where r.status = 'paused' and starts_with(r.reason, format('the budget of %s "', scope))
           and subject = case scope when 'instance' then i.name else p.name end order by r.id for no key update of r
    loop
        -- it may have a budget of its own that is spent as well, and stays paused then
        if not exists (select from _run_budgets(v_run) as b where b.spent_usd >= b.budget_usd) then
            return next resume_run(v_run.id);
        end if;
    end loop;
end;
$$;
comment on function pgharness.resume_spent(text, text) is
'Resume the runs that were paused at the budget of an instance or project, which is larger now; returns them. Raises PH006 (it is spent already). set_instance_budget() and set_project_budget() call it. Example: select * from pgharness.resume_spent(''project'', ''clinic'');';

create or replace function pgharness.set_instance_budget(instance text, total_budget_usd double precision) returns setof pgharness.run_receipt
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint := _instance_id(set_instance_budget.instance);
begin
    perform _check_settings(budget_usd => set_instance_budget.total_budget_usd);
    update instances as i set total_budget_usd = set_instance_budget.total_budget_usd where i.id = v_id;
    return query select * from resume_spent('instance', (select i.name from instances as i where i.id = v_id));
end;
$$;
comment on function pgharness.set_instance_budget(text, double precision) is
'Say what all runs of an instance may spend together (null: no limit), and resume those that were paused at the old budget; returns them. Idempotent. Raises PH001, PH006 (it is spent already). Example: select * from pgharness.set_instance_budget(''triage-v2'', 50);';

create or replace function pgharness.set_project_budget(project text, budget_usd double precision) returns setof pgharness.run_receipt
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint := _project_id(set_project_budget.project);
begin
    perform _check_settings(budget_usd => set_project_budget.budget_usd);
    update projects as p set budget_usd = set_project_budget.budget_usd where p.id = v_id;
    return query select * from resume_spent('project', (select p.name from projects as p where p.id = v_id));
end;
$$;
comment on function pgharness.set_project_budget(text, double precision) is
'Say what all runs of a project may spend together (null: no limit), and resume those that were paused at the old budget; returns them. Idempotent. Raises PH001, PH006 (it is spent already). Example: select * from pgharness.set_project_budget(''clinic'', 200);';

-- Prices.

create or replace function pgharness._resolve_model_prices() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    if new.model_id is not distinct from old.model_id then
        new.model_id := _model_id(new.model);
    end if;
    select m.name into new.model from models as m where m.id = new.model_id;
    perform _check_id('model', new.model_id, new.model);
    return new;
end;
$$;
comment on function pgharness._resolve_model_prices() is 'Fill the model of a price by name or id.';
create or replace trigger _100_resolve before insert or update on pgharness.model_prices
    for each row execute function pgharness._resolve_model_prices();

create or replace function pgharness._priced(model pgharness.models, at timestamptz default null) returns pgharness.models
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_at    timestamptz := coalesce(at, clock());
    v_price model_prices;
begin
    select * into v_price from model_prices as p
     where p.model_id = (_priced.model).id and p.valid_from <= v_at and (p.valid_until is null or p.valid_until > v_at)
     order by p.valid_from desc limit 1;
    if found then
        model.input_usd_per_million := coalesce(v_price.input_usd_per_million, model.input_usd_per_million);
        model.output_usd_per_million := coalesce(v_price.output_usd_per_million, model.output_usd_per_million);
        model.cached_input_usd_per_million := coalesce(v_price.cached_input_usd_per_million, model.cached_input_usd_per_million);
        model.batch_price_factor := coalesce(v_price.batch_price_factor, model.batch_price_factor);
    end if;
    return model;
end;
$$;
comment on function pgharness._priced(pgharness.models, timestamptz) is
'A model with the prices that hold at a time, now by default: of its row of model_prices that began last and is not over, else its own.';

create or replace function pgharness._token_cost(model pgharness.models, input_tokens double precision, output_tokens double precision, cached_tokens double precision default 0)
    returns double precision
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    select ((input_tokens - cached_tokens) * coalesce((model).input_usd_per_million, 0)
            + cached_tokens * coalesce((model).cached_input_usd_per_million, (model).input_usd_per_million, 0)
            + output_tokens * coalesce((model).output_usd_per_million, 0)) / 1e6;
$$;
comment on function pgharness._token_cost(pgharness.models, double precision, double precision, double precision) is
'What so many tokens cost by a model''s prices; those that are not set count as zero.';

create or replace function pgharness._text_cost(model pgharness.models, input_tokens double precision, output_tokens double precision) returns double precision
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select case when (_text_cost.model).provider not in ('ensemble', 'hedge') then _token_cost(_priced(_text_cost.model), input_tokens, output_tokens)
                else (select coalesce(sum(_text_cost(m, input_tokens, output_tokens)), 0)
                        from model_members as mm join models as m on m.id = mm.member_id
                       where mm.model_id = (_text_cost.model).id and ((_text_cost.model).provider = 'ensemble' or mm.number = 1)) end;
$$;
comment on function pgharness._text_cost(pgharness.models, double precision, double precision) is
'What a call of so many tokens would cost now: of an ensemble, all its members; of a hedge, the first.';

create or replace function pgharness.costs_per_correct(run_id bigint, threshold double precision default 0.5)
    returns table (combination_number integer, note_count bigint, scored_count bigint, correct_count bigint, mean_score double precision, note_cost_usd numeric,
                   grade_cost_usd numeric)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_count integer;
begin
    select d.combination_count into v_count from run_definitions as d where d.run_id = costs_per_correct.run_id and not d.definition ? 'code';
    return query
    select c.number, coalesce(scored.written, 0), coalesce(scored.notes, 0), coalesce(case when threshold = 0.5 then scored.correct else counted.correct end, 0), scored.mean, coalesce(cost.note, 0), coalesce(cost.grade, 0)
      from run_combinations as c
      left join (select s.cell % v_count as number, sum(s.note_count)::bigint as written, sum(s.scored_count)::bigint as notes, sum(s.correct_count)::bigint as correct,
                        sum(s.total) / nullif(sum(s.scored_count), 0)::double precision as mean
                   from _note_sums(costs_per_correct.run_id) as s group by 1) as scored on scored.number = c.number
      -- of another threshold than theirs the sums do not know
      left join (select note.ordinal % v_count as number, count(*) filter (where note.score >= threshold - 1e-9) as correct  -- as in _note_sums()
                   from (select g.note_ordinal as ordinal, avg(g.normalised_score) as score from grades as g
                          where g.run_id = costs_per_correct.run_id and threshold <> 0.5 group by 1) as note
                  group by 1) as counted on counted.number = c.number
      left join (select k.combination_number as number,
                        sum(k.cost_usd) filter (where k.kind = 'note') as note, sum(k.cost_usd) filter (where k.kind = 'grade') as grade
                   from call_totals as k where k.run_id = costs_per_correct.run_id and k.cost_usd > 0 group by 1) as cost on cost.number = c.number
     where c.run_id = costs_per_correct.run_id and v_count > 0;
end;
$$;
comment on function pgharness.costs_per_correct(bigint, double precision) is
'What each combination of a run has cost and how many of its notes are correct: those whose mean score (each grade as a share of the highest possible one) is at least the threshold. View cost_per_correct has it for all runs. Example: select * from pgharness.costs_per_correct(1, 0.8);';
