-- Scores of a run's notes, summed per cell: of what is settled the sums are stored, the rest is summed up at each look; and settling itself.
-- Each function is planned for the run that it is asked about and without JIT. Hash tables in memory, filled side by side, are quicker than sorts on disk.

create or replace function pgharness._cell_count(run_id bigint) returns bigint
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select d.case_count::bigint * d.combination_count * cardinality(d.transcript_overlaps) from run_definitions as d where d.run_id = _cell_count.run_id;
$$;
comment on function pgharness._cell_count(bigint) is
'How many cells a run has: cases x combinations x overlaps, what replications share. A note''s ordinal modulo it names the cell, and _note_place() of that the case, combination and overlap.';

create or replace function pgharness._score_sums(run_id bigint, beyond bigint default null)
    returns table (cell bigint, rubric_number integer, note_count bigint, grade_count bigint, mean_score double precision, squares double precision,
                   min_score double precision, max_score double precision)
    language plpgsql stable security invoker rows 10000 set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
    set work_mem = '64MB' set parallel_tuple_cost = 0
as $$
declare
    v_cells     bigint := _cell_count(_score_sums.run_id);
    v_settled   bigint := (select r.settled_notes from runs as r where r.id = _score_sums.run_id);
    v_beyond    bigint := coalesce(_score_sums.beyond, 9223372036854775807);
    v_is_single boolean := not exists (select from run_combinations as c where c.run_id = _score_sums.run_id and c.grade_replications > 1);
begin
    return query
    -- at most two parts a cell; the sum of squares about their common mean: Chan, Golub and LeVeque 1983
    select part.cell, part.rubric_number, sum(part.note_count)::bigint, sum(part.grade_count)::bigint,
           sum(part.note_count * part.mean_score) / sum(part.note_count::double precision),
           sum(part.squares) + (max(part.mean_score) - min(part.mean_score)) ^ 2
               * (sum(part.note_count::double precision) ^ 2 - sum(part.note_count::double precision ^ 2)) / 2 / sum(part.note_count::double precision),
           min(part.min_score), max(part.max_score)
      from (select s.cell, s.rubric_number, s.note_count, s.grade_count, s.mean_score, s.squares, s.min_score, s.max_score
              from settled_scores as s where s.run_id = _score_sums.run_id and s.settled_notes = v_settled and v_settled > 0
            union all
            select each.cell, each.rubric_number, count(*), sum(each.grade_count)::bigint, avg(each.score), coalesce(var_samp(each.score) * (count(*) - 1), 0),
                   min(each.score), max(each.score)
              from (
                   -- a single grade by a rubric is the note's score; the planner leaves out the branch that is not needed
                   select g.note_ordinal % v_cells as cell, g.rubric_number, g.normalised_score as score, 1::bigint as grade_count
                     from grades as g where g.run_id = _score_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond and v_is_single
                   union all
                   select g.note_ordinal % v_cells, g.rubric_number, avg(g.normalised_score), count(*)
                     from grades as g where g.run_id = _score_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond and not v_is_single
                    group by g.note_ordinal, g.rubric_number) as each
             group by each.cell, each.rubric_number) as part
     group by part.cell, part.rubric_number;
end;
$$;
comment on function pgharness._score_sums(bigint, bigint) is
'Scores of a run''s notes by each rubric, per cell (see _cell_count), with the sum of squares about their mean: what is settled, and of the grades after it (those of notes below an ordinal) the primary key alone.';

create or replace function pgharness._note_sums(run_id bigint, beyond bigint default null)
    returns table (cell bigint, note_count bigint, scored_count bigint, grade_count bigint, correct_count bigint, total double precision,
                   squares double precision, lowest double precision, highest double precision)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_cells     bigint := _cell_count(_note_sums.run_id);
    v_settled   bigint := (select r.settled_notes from runs as r where r.id = _note_sums.run_id);
    v_beyond    bigint := coalesce(_note_sums.beyond, 9223372036854775807);
    v_is_single boolean := not exists (select from run_combinations as c where c.run_id = _note_sums.run_id and c.grades_per_note > 1);
begin
    return query
    select part.cell, sum(part.note_count)::bigint, coalesce(sum(part.scored_count), 0)::bigint, coalesce(sum(part.grade_count), 0)::bigint,
           coalesce(sum(part.correct_count), 0)::bigint, sum(part.total),
           -- as in _score_sums()
           coalesce(sum(part.squares)
               + (max(part.total / part.scored_count) - min(part.total / part.scored_count)) ^ 2
               * (sum(part.scored_count::double precision) ^ 2 - sum(part.scored_count::double precision ^ 2)) / 2 / sum(part.scored_count::double precision), 0),
           min(part.lowest), max(part.highest)
      from (select s.cell, s.note_count, nullif(s.scored_count, 0) as scored_count, s.grade_count, s.correct_count, s.total, s.squares, s.lowest, s.highest
              from settled_note_scores as s where s.run_id = _note_sums.run_id and s.settled_notes = v_settled and v_settled > 0
            union all
            select n.ordinal % v_cells, count(*), null, null, null, null, null, null, null
              from notes as n where n.run_id = _note_sums.run_id and n.ordinal >= v_settled and n.ordinal < v_beyond group by 1
            union all
            -- a mean of a half is a little less in some orders of addition: (.12 + .97 + .41) / 3
            select note.ordinal % v_cells, null, count(*), sum(note.grade_count)::bigint, count(*) filter (where note.score >= 0.5 - 1e-9), sum(note.score),
                   coalesce(var_samp(note.score) * (count(*) - 1), 0), min(note.score), max(note.score)
              from (select g.note_ordinal as ordinal, g.normalised_score as score, 1::bigint as grade_count
                      from grades as g where g.run_id = _note_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond and v_is_single
                    union all
                    select g.note_ordinal, avg(g.normalised_score), count(*)
                      from grades as g where g.run_id = _note_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond and not v_is_single
                     group by g.note_ordinal) as note
             group by 1) as part
     group by part.cell;
end;
$$;
comment on function pgharness._note_sums(bigint, bigint) is
'Notes of a run per cell (see _cell_count), and of those with grades how many score at least 0.5, and the sum, the sum of squares about the cell''s mean and the extremes of their scores, each the mean of its grades: what is settled, and the notes after it (below an ordinal).';

create or replace function pgharness._pair_sums(run_id bigint, beyond bigint default null)
    returns table (cell bigint, rubric_a integer, rubric_b integer, note_count bigint, total_a double precision, total_b double precision,
                   squares_a double precision, squares_b double precision, products double precision, differences double precision,
                   min_a double precision, max_a double precision, min_b double precision, max_b double precision)
    language plpgsql stable security invoker rows 10000 set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_plan      run_definitions;
    v_cells     bigint := _cell_count(_pair_sums.run_id);
    v_settled   bigint := (select r.settled_notes from runs as r where r.id = _pair_sums.run_id);
    v_beyond    bigint := coalesce(_pair_sums.beyond, 9223372036854775807);
    v_rubrics   integer := (select max(rr.number) from run_rubrics as rr where rr.run_id = _pair_sums.run_id);
    v_first     integer[];
    v_is_single boolean;
begin
    select * into strict v_plan from run_definitions as d where d.run_id = _pair_sums.run_id;
    -- an author with several rubrics of a case, as imported runs may have, counts once: under the first of them
    select array_agg(each.first order by each.case_number, each.number), bool_and(each.first = each.number) into v_first, v_is_single
      from (select rc.number as case_number, n as number, min(rr.number) over (partition by rc.number, ru.author) as first
              from run_cases as rc
             cross join generate_series(1, v_rubrics) as n
              left join run_rubrics as rr on rr.run_id = rc.run_id and rr.case_number = rc.number and rr.number = n
              left join rubrics as ru on ru.id = rr.rubric_id
             where rc.run_id = _pair_sums.run_id) as each;
    return query
    select part.cell, part.rubric_a, part.rubric_b, sum(part.note_count)::bigint, sum(part.total_a), sum(part.total_b), sum(part.squares_a), sum(part.squares_b),
           sum(part.products), sum(part.differences), min(part.min_a), max(part.max_a), min(part.min_b), max(part.max_b)
      from (select s.cell, s.rubric_a, s.rubric_b, s.note_count, s.total_a, s.total_b, s.squares_a, s.squares_b, s.products, s.differences,
                   s.min_a, s.max_a, s.min_b, s.max_b
              from settled_pairs as s where s.run_id = _pair_sums.run_id and s.settled_notes = v_settled and v_settled > 0
            union all
            select note.ordinal % v_cells, pair.a, pair.b, count(*), sum(note.a), sum(note.b), sum(note.a * note.a), sum(note.b * note.b), sum(note.a * note.b),
                   sum(abs(note.a - note.b)), min(note.a), max(note.a), min(note.b), max(note.b)
              from (select i as a, j as b from generate_series(1, v_rubrics) as i cross join generate_series(i + 1, v_rubrics) as j) as pair
             cross join lateral (
                   select g.note_ordinal as ordinal, avg(g.normalised_score) filter (where author.place = pair.a) as a,
                          avg(g.normalised_score) filter (where author.place = pair.b) as b
                     from grades as g
                    cross join lateral (
                          select case when v_is_single or g.rubric_number = 0 then g.rubric_number
                                      else v_first[(g.note_ordinal / v_plan.combination_count % v_plan.case_count)::integer * v_rubrics + g.rubric_number] end as place) as author
                    where g.run_id = _pair_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond
                      and (v_rubrics <= 2 or author.place in (pair.a, pair.b))
                    group by g.note_ordinal) as note
             where note.a is not null and note.b is not null
             group by note.ordinal % v_cells, pair.a, pair.b) as part
     group by part.cell, part.rubric_a, part.rubric_b;
end;
$$;
comment on function pgharness._pair_sums(bigint, bigint) is
'Sums over the notes of a run that two authors'' rubrics graded, per cell (see _cell_count) and pair of rubric numbers: enough for the agreement of the authors. What is settled, and the notes after it (below an ordinal).';

create or replace function pgharness._spread_sums(run_id bigint, beyond bigint default null)
    returns table (cell bigint, rubric_number integer, note_count bigint, grade_count bigint, squares double precision, differences double precision, pair_count bigint)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_cells   bigint := _cell_count(_spread_sums.run_id);
    v_settled bigint := (select r.settled_notes from runs as r where r.id = _spread_sums.run_id);
    v_beyond  bigint := coalesce(_spread_sums.beyond, 9223372036854775807);
    v_most    integer := (select max(c.grade_replications) from run_combinations as c where c.run_id = _spread_sums.run_id);
begin
    if v_most < 2 then
        return;
    end if;
    return query
    select part.cell, part.rubric_number, sum(part.note_count)::bigint, sum(part.grade_count)::bigint, sum(part.squares), sum(part.differences), sum(part.pair_count)::bigint
      from (select s.cell, s.rubric_number, s.note_count, s.grade_count, s.squares, s.differences, s.pair_count
              from settled_spreads as s where s.run_id = _spread_sums.run_id and s.settled_notes = v_settled and v_settled > 0
            union all
            select each.note_ordinal % v_cells, each.rubric_number, count(*), sum(each.grade_count)::bigint, sum(each.squares),
                   -- over all pairs, the i-th of n sorted scores is the larger one i - 1 times and the smaller one n - i times; of up to three only the range is left
                   sum(case when v_most <= 3 then each.range * (each.grade_count - 1)
                            else (select sum((2 * x.i - 1 - each.grade_count) * x.score) from unnest(each.sorted) with ordinality as x (score, i)) end),
                   sum(each.grade_count * (each.grade_count - 1) / 2)::bigint
              from (select g.note_ordinal, g.rubric_number, count(*) as grade_count, var_samp(g.normalised_score) * (count(*) - 1) as squares,
                           max(g.normalised_score) - min(g.normalised_score) as range,
                           case when v_most > 3 then array_agg(g.normalised_score order by g.normalised_score) end as sorted
                      from grades as g where g.run_id = _spread_sums.run_id and g.note_ordinal >= v_settled and g.note_ordinal < v_beyond
                     group by g.note_ordinal, g.rubric_number having count(*) >= 2) as each
             group by each.note_ordinal % v_cells, each.rubric_number) as part
     group by part.cell, part.rubric_number;
end;
$$;
comment on function pgharness._spread_sums(bigint, bigint) is
'How far several grades of one note by one rubric differ, summed per cell (see _cell_count) and rubric of a run: squares about each mean, and differences over all pairs. What is settled, and the notes after it (below an ordinal).';

-- Settling

create or replace function pgharness._decided_until(run_id bigint, first bigint, beyond bigint) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off set enable_seqscan = off
as $$
declare
    v_cells   bigint := _cell_count(_decided_until.run_id);
    v_stride  integer := (select d.grade_stride from run_definitions as d where d.run_id = _decided_until.run_id);
    v_planned bigint := (select (r.note_count + r.grade_count) * v_cells / r.note_count from runs as r where r.id = _decided_until.run_id);
begin
    return coalesce((
        select min(replication)
          from generate_series(first / v_cells, beyond / v_cells - 1) as replication
          left join (
               select n.ordinal / v_cells as number, count(*) as items
                 from notes as n where n.run_id = _decided_until.run_id and n.ordinal >= first and n.ordinal < beyond group by 1
               union all
               select g.note_ordinal / v_cells, count(*)
                 from grades as g where g.run_id = _decided_until.run_id and g.note_ordinal >= first and g.note_ordinal < beyond group by 1
               union all
               -- a failed note decides its grades too
               select f.ordinal / v_cells, sum(1 + c.grades_per_note)
                 from failures as f
                 join run_definitions as d on d.run_id = f.run_id
                 join run_combinations as c on c.run_id = f.run_id and c.number = f.ordinal % d.combination_count
                where f.run_id = _decided_until.run_id and f.kind = 'note' and f.status = 'failed' and f.ordinal >= first and f.ordinal < beyond group by 1
               union all
               select f.ordinal / v_stride / v_cells, count(*)
                 from failures as f
                where f.run_id = _decided_until.run_id and f.kind = 'grade' and f.status = 'failed' and f.ordinal >= first * v_stride and f.ordinal < beyond * v_stride
                group by 1) as decided on decided.number = replication
         group by replication having coalesce(sum(decided.items), 0) < v_planned
         order by replication limit 1) * v_cells, beyond);
end;
$$;
comment on function pgharness._decided_until(bigint, bigint, bigint) is
'The note ordinal up to which a run''s notes, from the first ordinal given and below the second (whole replications), are all decided: written or failed for good, and so all their grades.';

create or replace function pgharness._settle_scores(run_id bigint, least_grades bigint, least_replications integer, most_notes bigint) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   runs;
    v_cells bigint := _cell_count(_settle_scores.run_id);
    v_least bigint;
    v_next  bigint;
begin
    -- against deletion alone: outcomes are recorded meanwhile
    select * into v_run from runs as r where r.id = _settle_scores.run_id and r.archived_at is null and r.grade_count > 0 for key share;
    if not found then
        return 0;
    end if;
    -- a step is worth writing all sums anew: several replications of their cells, and a tenth of what they hold
    v_least := greatest(least_replications, ceil(v_run.settled_notes / 10.0 / v_cells), ceil(least_grades::numeric * v_run.note_count / v_run.grade_count / v_cells))::bigint * v_cells;
    -- not past what waits for its next try, which may be long
    v_next := least(v_run.settled_notes + greatest(v_least, most_notes / v_cells * v_cells), v_run.note_count,
                    (select min(case f.kind when 'note' then f.ordinal else f.ordinal / d.grade_stride end) / v_cells * v_cells
                       from failures as f join run_definitions as d on d.run_id = f.run_id where f.run_id = v_run.id and f.status = 'waiting'));
    if v_next < v_run.settled_notes + v_least then
        return 0;
    end if;
    v_next := _decided_until(v_run.id, v_run.settled_notes, v_next);
    if v_next < v_run.settled_notes + v_least then
        return 0;
    end if;
    if v_run.settled_notes = 0 then                     -- of what was opened again
        perform _drop_settled(v_run.id, null);
    end if;
    insert into settled_scores select v_run.id, v_next, s.* from _score_sums(v_run.id, v_next) as s;
    insert into settled_note_scores select v_run.id, v_next, s.* from _note_sums(v_run.id, v_next) as s;
    insert into settled_pairs select v_run.id, v_next, s.* from _pair_sums(v_run.id, v_next) as s;
    insert into settled_spreads select v_run.id, v_next, s.* from _spread_sums(v_run.id, v_next) as s;
    perform _drop_settled(v_run.id, v_next);
    -- only now the lock that recording needs. If decided items were opened again meanwhile, nothing is settled, and no row of sums counts
    update runs as r set settled_notes = v_next
     where r.id = v_run.id and r.settled_notes = v_run.settled_notes and r.reopenings = v_run.reopenings and r.archived_at is null;
    return case when found then v_next - v_run.settled_notes else 0 end;
end;
$$;
comment on function pgharness._settle_scores(bigint, bigint, integer, bigint) is
'Settle one more step of a run if it is decided; returns how many notes that is. Its parameters are those of settle_scores(); the caller is the only one who settles.';

create or replace function pgharness._drop_settled(run_id bigint, except_notes bigint) returns void
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    delete from settled_scores as s where s.run_id = _drop_settled.run_id and s.settled_notes is distinct from except_notes;
    delete from settled_note_scores as s where s.run_id = _drop_settled.run_id and s.settled_notes is distinct from except_notes;
    delete from settled_pairs as s where s.run_id = _drop_settled.run_id and s.settled_notes is distinct from except_notes;
    delete from settled_spreads as s where s.run_id = _drop_settled.run_id and s.settled_notes is distinct from except_notes;
end;
$$;
comment on function pgharness._drop_settled(bigint, bigint) is 'Delete the sums of a run but those of one number of settled notes; of null all.';

create or replace function pgharness.settle_scores(
    worker_id bigint default null, least_grades bigint default 50000, least_replications integer default 4, most_notes bigint default 100000
) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   bigint;
    v_notes bigint;
begin
    -- the oldest worker alive settles, lest all of them look for what to do
    if settle_scores.worker_id > (select min(w.id) from workers as w where w.status = 'running' and w.heartbeat_at > clock() - interval '10 seconds')
       or not pg_try_advisory_xact_lock(hashtextextended('pgharness.settle_scores', 0)) then
        return 0;
    end if;
    for v_run in
        -- the counters say of which runs enough is decided; of one that was cancelled or failed, what is not decided may never be
        select r.id from runs as r
         where r.archived_at is null and r.status in ('running', 'paused', 'completed')
           and r.grades_succeeded + r.grades_failed + r.grades_skipped - r.settled_notes * r.grade_count / nullif(r.note_count, 0)
               >= greatest(least_grades, r.settled_notes * r.grade_count / nullif(r.note_count, 0) / 10)
           and r.notes_succeeded + r.notes_failed - r.settled_notes >= least_replications * _cell_count(r.id)
           and least_replications * _cell_count(r.id) <= 5 * most_notes  -- of more, a step would take too long
         order by r.id
    loop
        v_notes := _settle_scores(v_run, least_grades, least_replications, most_notes);
        if v_notes > 0 then
            return v_notes;
        end if;
    end loop;
    return 0;
end;
$$;
comment on function pgharness.settle_scores(bigint, bigint, integer, bigint) is
'For workers, every few seconds: sum up the scores of the next notes of a run, so that views need not read their grades. Those are whole replications in which every note and grade is decided (made, failed for good, or skipped): at least so many replications and grades, and a tenth of what is settled; at most about so many notes (runs whose replications are too large for that are left out). One run a call, one settler at a time, the oldest worker alive (null is anybody); returns how many notes it settled. retry_failed() opens all again. Example: select pgharness.settle_scores();';
