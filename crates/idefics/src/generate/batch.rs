//! All requests that are alive, and the turn that moves them on: start some, read a picture, free memory, feed a
//! step, choose tokens.
//!
//! [`Generation`](super::Generation) drives it for a list of prompts, [`Engine`](super::Engine) for whatever comes
//! while it runs. Each sequence gets exactly the tokens it would get alone: rows of a step share nothing, draws
//! are keyed by seed and answer, rules see one sequence, and what is taken from an earlier request or read again
//! after a preemption has the same bits as what is read for the first time.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{
    Decode, EngineEvent, Event, GenerateError, LogitsOf, StepModel,
    admission::{Admission, Load},
    group::{Group, Reuse},
    image_cache::ImageCache,
    memory::Memory,
    prefix_cache::PrefixCache,
    request::{Job, seen},
    scheduler::Scheduler,
    stats::Counters,
};
use crate::processor::{ImageHash, PixelValues};

/// Waiting requests that are looked at in a turn.
const LOOK_AHEAD: usize = 16;

pub(crate) struct Batch<'a, M: StepModel> {
    model: &'a M,
    decoder: Option<&'a dyn Decode>,
    scheduler: Scheduler,
    admission: Admission,
    /// In the order they came, preempted ones included.
    waiting: VecDeque<Member<'a, M>>,
    /// In the order they started.
    running: Vec<Member<'a, M>>,
    images: ImageCache<M::Image>,
    prefixes: PrefixCache<M::Cache>,
    counters: Arc<Counters>,
}

/// One request and what it has beside its tokens.
struct Member<'a, M: StepModel> {
    id: u64,
    group: Group<'a, M::Cache>,
    /// The beginning of the prompt as an earlier request left it, and its length; until the pictures are there.
    prefix: Option<(M::Cache, usize)>,
    /// Pictures that were read for it since it started.
    images_read: usize,
    /// Requests that came later and started before it.
    overtaken: u32,
}

/// What happened to which request.
pub(crate) type Outcome = (u64, EngineEvent);

impl<'a, M: StepModel> Batch<'a, M> {
    pub(crate) fn new(
        model: &'a M,
        decoder: Option<&'a dyn Decode>,
        scheduler: Scheduler,
        memory: Memory,
        counters: Arc<Counters>,
    ) -> Self {
        let admission = Admission {
            bytes: memory.bytes,
            sequences: scheduler.max_sequences,
            answer_share: memory.answer_share,
            overtakes: memory.overtakes,
        };
        let (images, prefixes) =
            (ImageCache::new(memory.kept_image_bytes), PrefixCache::new(memory.kept_prefix_bytes));
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Self { model, decoder, scheduler, admission, waiting, running, images, prefixes, counters }
    }

    /// Adds a request that was checked. Later ones have larger ids.
    pub(crate) fn submit(&mut self, id: u64, job: Job<'a>) {
        let group = Group::new(job, self.decoder);
        self.waiting.push_back(Member { id, group, prefix: None, images_read: 0, overtaken: 0 });
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Moves everything on by at most one step of the model, and by one picture.
    pub(crate) fn turn(&mut self, out: &mut Vec<Outcome>) {
        self.drop_cancelled(out);
        self.start_waiting(out);
        self.read_pictures(out);
        self.load();
        // Reading a picture may have taken long.
        self.drop_cancelled(out);
        self.make_room();
        self.feed(out);
        self.choose(out);
        self.settle(out);
        self.count();
    }

    /// Ends all answers where they are; prompts that had no turn yet have empty answers.
    pub(crate) fn cancel_all(&mut self, out: &mut Vec<Outcome>) {
        while let Some(member) = self.waiting.pop_front() {
            self.drop_waiting(member, out);
        }
        for member in &mut self.running {
            cancel(member, out);
        }
        self.settle(out);
        self.count();
    }

    /// Gives up, as if nothing had been there; returns the requests that were alive.
    pub(crate) fn give_up(self) -> impl Iterator<Item = u64> {
        let Self { waiting, running, counters, .. } = self;
        counters.alive(0, 0, 0);
        counters.bytes(0, 0, 0, 0);
        let members = waiting.into_iter().chain(running);
        members.map(move |member| {
            if !member.group.is_started() {
                counters.left_queue();
            }
            member.id
        })
    }

    fn drop_cancelled(&mut self, out: &mut Vec<Outcome>) {
        let is_cancelled = |member: &Member<'_, M>| member.group.is_cancelled();
        for index in (0..self.waiting.len()).rev() {
            if is_cancelled(&self.waiting[index])
                && let Some(member) = self.waiting.remove(index)
            {
                self.drop_waiting(member, out);
            }
        }
        for member in self.running.iter_mut().filter(|member| member.group.is_cancelled()) {
            cancel(member, out);
        }
        self.settle(out);
    }

    fn drop_waiting(&mut self, mut member: Member<'a, M>, out: &mut Vec<Outcome>) {
        cancel(&mut member, out);
        if !member.group.is_started() {
            self.counters.left_queue();
        }
        self.finish(member, out);
    }

    /// Starts waiting requests while there is room for them.
    fn start_waiting(&mut self, out: &mut Vec<Outcome>) {
        loop {
            let waiting = self
                .waiting
                .iter()
                .take(LOOK_AHEAD)
                .map(|member| (self.expected_load(member, true), member.overtaken));
            let Some(index) = self.admission.choose(self.alive(), waiting) else { return };
            for overtaken in self.waiting.iter_mut().take(index) {
                overtaken.overtaken += 1;
            }
            let Some(mut member) = self.waiting.remove(index) else { return };
            let images = self.pin_pictures(&member);
            let tokens = self.take_prefix(&mut member);
            if member.group.start(Reuse { tokens, images }) {
                self.counters.reused(tokens, images);
                self.counters.left_queue();
                out.push((member.id, EngineEvent::Started));
            }
            self.running.push(member);
            self.trim_kept();
        }
    }

    /// What the running requests are counted with.
    fn alive(&self) -> Load {
        let loads = self.running.iter().map(|member| self.expected_load(member, false));
        let pictures = Load { sequences: 0, bytes: self.images.pinned_bytes() };
        loads.fold(pictures, |sum, load| Load {
            sequences: sum.sequences + load.sequences,
            bytes: sum.bytes.saturating_add(load.bytes),
        })
    }

    /// What a request is counted with, the pictures that it would add included if asked for.
    fn expected_load(&self, member: &Member<'_, M>, with_pictures: bool) -> Load {
        let group = &member.group;
        let prompt = group.inputs().token_ids.len();
        let len = self.admission.expected_len(prompt, group.len(), group.full_len());
        let pictures = if with_pictures { self.images.new_bytes(&self.pictures(group)) } else { 0 };
        let sequences = group.width();
        Load { sequences, bytes: pictures.saturating_add(self.lanes_bytes(sequences, len)) }
    }

    fn lanes_bytes(&self, lanes: usize, tokens: usize) -> usize {
        self.model.cache_bytes(tokens).saturating_mul(lanes)
    }

    /// Bytes of the running requests once all their tokens are read.
    fn taken(&self) -> usize {
        let lanes = |member: &Member<'_, M>| self.lanes_bytes(member.group.width(), member.group.len());
        self.running.iter().map(lanes).fold(self.images.pinned_bytes(), usize::saturating_add)
    }

    fn pictures(&self, group: &Group<'_, M::Cache>) -> Vec<(ImageHash, usize)> {
        let images = group.inputs().images.iter();
        images.map(|image| (image.content_hash(), self.model.image_bytes(image))).collect()
    }

    /// Returns how many of the pictures need not be read for this request.
    fn pin_pictures(&mut self, member: &Member<'_, M>) -> usize {
        let pictures = self.pictures(&member.group);
        pictures.into_iter().map(|(hash, bytes)| usize::from(self.images.pin(hash, bytes))).sum()
    }

    fn unpin_pictures(&mut self, group: &Group<'_, M::Cache>) {
        for image in &group.inputs().images {
            self.images.unpin(image.content_hash());
        }
    }

    /// Gives the request the longest beginning of its prompt that an earlier one left, and returns its length.
    fn take_prefix(&mut self, member: &mut Member<'_, M>) -> usize {
        if !member.group.config().use_cache {
            return 0;
        }
        let [first, others @ ..] = member.group.lanes() else { return 0 };
        let seen = seen(member.group.inputs(), first.token_ids(), first.image_index());
        // The last token is read in any case, since its logits are wanted; and lanes agree in the prompt alone.
        let end = if others.is_empty() { seen.len() } else { member.group.inputs().token_ids.len() } - 1;
        let Some(found) = self.prefixes.find(&seen[..end]) else { return 0 };
        // As there is a place for the request, the entry can be had: as a copy, or, where both do not fit, itself.
        let bytes = self.lanes_bytes(member.group.width(), member.group.len());
        let beside = self.taken().saturating_add(bytes).saturating_add(self.prefixes.bytes_of(found));
        let cache = if beside <= self.admission.bytes {
            self.model.copy_prefix(self.prefixes.get(found), found.tokens)
        } else {
            let mut cache = self.prefixes.take(found);
            self.model.truncate(&mut cache, found.tokens);
            cache
        };
        member.prefix = Some((cache, found.tokens));
        found.tokens
    }

    /// Drops what is only kept for later where it is in the way. Pictures stay longest: a byte of them saves most
    /// work.
    fn trim_kept(&mut self) {
        let room = self.admission.bytes.saturating_sub(self.taken());
        while self.prefixes.bytes() + self.images.idle_bytes() > room {
            if !self.prefixes.evict() && !self.images.evict() {
                break;
            }
        }
    }

    /// Reads the next picture, or a few if nobody else has to wait for it.
    fn read_pictures(&mut self, out: &mut Vec<Outcome>) {
        let is_busy = self.running.iter().any(|member| member.group.is_loaded());
        let limit = if is_busy { 1 } else { self.scheduler.max_step_images.max(1) };
        let mut wanted: Vec<Arc<PixelValues>> = Vec::with_capacity(limit);
        let mut owner = None;
        while wanted.len() < limit {
            let Some((index, image)) = self.next_picture(&wanted) else { break };
            self.running[index].images_read += 1;
            owner.get_or_insert(index);
            wanted.push(image);
        }
        let Some(owner) = owner else { return };
        if let Err((image, error)) = self.encode(&wanted) {
            // Whoever shows the picture fails, one after another.
            let shows = |member: &Member<'_, M>| {
                member.group.inputs().images.iter().any(|i| i.content_hash() == image.content_hash())
            };
            let index = self.running.iter().position(shows).unwrap_or(owner);
            self.fail(index, error, out);
        }
    }

    /// The next picture to read beside those that are chosen already: of the request that had fewest read so far,
    /// so that one with few pictures does not wait for one with many.
    fn next_picture(&self, chosen: &[Arc<PixelValues>]) -> Option<(usize, Arc<PixelValues>)> {
        let is_missing = |image: &&Arc<PixelValues>| {
            let hash = image.content_hash();
            self.images.get(hash).is_none() && chosen.iter().all(|chosen| chosen.content_hash() != hash)
        };
        let missing = self.running.iter().enumerate().filter(|(_, member)| !member.group.is_loaded());
        let missing = missing.filter_map(|(index, member)| {
            let image = member.group.inputs().images.iter().find(is_missing)?;
            Some((member.images_read, index, image))
        });
        let (_, index, image) = missing.min_by_key(|(read, index, _)| (*read, *index))?;
        Some((index, Arc::clone(image)))
    }

    /// Reads pictures into the cache: together, and where that fails one by one, up to the first that fails alone.
    fn encode(&mut self, images: &[Arc<PixelValues>]) -> Result<(), (Arc<PixelValues>, GenerateError)> {
        let together: Vec<&PixelValues> = images.iter().map(AsRef::as_ref).collect();
        match guard(|| self.model.encode_images(&together)) {
            Ok(read) => {
                self.counters.images_encoded(read.len());
                for (image, read) in images.iter().zip(read) {
                    self.images.insert(image.content_hash(), read);
                }
                Ok(())
            }
            Err(error) => match images {
                [only] => Err((Arc::clone(only), error)),
                several => several.iter().try_for_each(|one| self.encode(std::slice::from_ref(one))),
            },
        }
    }

    /// Gives caches to requests whose pictures are all there.
    fn load(&mut self) {
        for member in self.running.iter_mut().filter(|member| !member.group.is_loaded()) {
            let images = member.group.inputs().images.iter();
            let states: Option<Vec<_>> =
                images.map(|image| self.images.get(image.content_hash()).cloned()).collect();
            let Some(states) = states else { continue };
            let (cache, fed) = match member.prefix.take() {
                Some((mut cache, fed)) => {
                    self.model.set_images(&mut cache, states);
                    (cache, fed)
                }
                None => (self.model.new_cache(states), 0),
            };
            member.group.load(cache, fed);
        }
    }

    /// Frees memory where the answers have outgrown it. What a preempted request had read it reads again later.
    fn make_room(&mut self) {
        while let Some(index) =
            self.admission.victim(self.taken(), self.running.iter().map(|member| member.id))
        {
            let mut member = self.running.remove(index);
            member.group.unload();
            member.prefix = None;
            member.images_read = 0;
            self.unpin_pictures(&member.group);
            self.counters.preempted();
            let place = self.waiting.partition_point(|waiting| waiting.id < member.id);
            self.waiting.insert(place, member);
        }
        self.trim_kept();
    }

    /// Lets the model read the tokens that the scheduler grants.
    fn feed(&mut self, out: &mut Vec<Outcome>) {
        let demands: Vec<_> = self.running.iter().flat_map(|member| member.group.demands()).collect();
        let mut grants = self.scheduler.plan(&demands).into_iter();
        let grants: Vec<Vec<usize>> = self
            .running
            .iter()
            .map(|member| grants.by_ref().take(member.group.lanes().len()).collect())
            .collect();
        let everybody: Vec<usize> =
            (0..self.running.len()).filter(|&index| grants[index].iter().any(|&count| count > 0)).collect();
        if everybody.is_empty() {
            return;
        }
        let Err(error) = self.step(&everybody, &grants) else { return };
        let mut failed = Vec::new();
        if let [one] = everybody[..] {
            failed.push((one, error));
        } else {
            // The error may be one request's alone: the others go on.
            for &index in &everybody {
                failed.extend(self.step(&[index], &grants).err().map(|error| (index, error)));
            }
        }
        for (index, error) in failed.into_iter().rev() {
            self.fail(index, error, out);
        }
    }

    /// One step of the given members. After an error it is as if it had not been.
    fn step(&mut self, members: &[usize], grants: &[Vec<usize>]) -> Result<(), GenerateError> {
        let mut rows = Vec::new();
        let mut readers = Vec::new();
        for (index, member) in
            self.running.iter_mut().enumerate().filter(|(index, _)| members.contains(index))
        {
            for (number, lane) in member.group.lanes_mut().iter_mut().enumerate() {
                let count = grants[index][number];
                if count > 0 {
                    let logits = if count == lane.pending() { LogitsOf::Last } else { LogitsOf::Nothing };
                    readers.push((index, number, lane.fed(), logits));
                    rows.push(lane.feed(count, logits));
                }
            }
        }
        let tokens: usize = rows.iter().map(|row| row.token_ids.len()).sum();
        let vocab_size = self.model.vocab_size();
        let expected = |logits_of| if logits_of == LogitsOf::Last { vocab_size } else { 0 };
        let result = guard(|| self.model.step(&mut rows)).and_then(|outputs| {
            if outputs.len() != readers.len() {
                return Err(GenerateError::LogitsShape { expected: readers.len(), got: outputs.len() });
            }
            let wrong = outputs.iter().zip(&readers).find(|(row, reader)| row.len() != expected(reader.3));
            match wrong {
                Some((row, reader)) => {
                    Err(GenerateError::LogitsShape { expected: expected(reader.3), got: row.len() })
                }
                None => Ok(outputs),
            }
        });
        match result {
            Ok(outputs) => {
                self.counters.step(readers.len(), tokens);
                for ((index, lane, _, logits_of), logits) in readers.into_iter().zip(outputs) {
                    if logits_of == LogitsOf::Last {
                        self.running[index].group.receive(lane, logits);
                    }
                }
                Ok(())
            }
            Err(error) => {
                for (index, lane, fed, _) in readers {
                    let lane = &mut self.running[index].group.lanes_mut()[lane];
                    lane.take_back(fed, |cache, tokens| self.model.truncate(cache, tokens));
                }
                Err(error)
            }
        }
    }

    /// Lets all that have their logits choose their tokens.
    fn choose(&mut self, out: &mut Vec<Outcome>) {
        let mut failed = Vec::new();
        let mut events = Vec::new();
        for (index, member) in self.running.iter_mut().enumerate() {
            if let Err(error) = member.group.advance(&mut events) {
                failed.push((index, error));
            }
            tell(member.id, &mut events, out);
        }
        for (index, error) in failed.into_iter().rev() {
            self.fail(index, error, out);
        }
    }

    /// Hands over what is done.
    fn settle(&mut self, out: &mut Vec<Outcome>) {
        while let Some(index) = self.running.iter().position(|member| member.group.is_done()) {
            let member = self.running.remove(index);
            self.unpin_pictures(&member.group);
            self.finish(member, out);
        }
    }

    /// Tells the answers of a request that is done, and keeps what it remembered.
    fn finish(&mut self, mut member: Member<'a, M>, out: &mut Vec<Outcome>) {
        self.keep_prefix(&mut member);
        let mut events = Vec::new();
        let generated = member.group.into_generated(&mut events);
        tell(member.id, &mut events, out);
        self.counters.finished(&generated);
        out.push((member.id, EngineEvent::Finished(generated)));
    }

    fn keep_prefix(&mut self, member: &mut Member<'_, M>) {
        let Some(mut lane) = member.group.take_retired() else { return };
        let fed = lane.fed();
        // Cancelled before its pictures were there: what it had taken goes back.
        let kept = lane.unload().map(|cache| (cache, fed)).or_else(|| member.prefix.take());
        let Some((mut cache, fed)) = kept else { return };
        let mut seen = seen(member.group.inputs(), lane.token_ids(), lane.image_index());
        seen.truncate(fed);
        self.model.set_images(&mut cache, Vec::new());
        let bytes = self.model.cache_bytes(fed);
        self.prefixes.insert(seen, cache, bytes);
        self.trim_kept();
    }

    /// Ends one request with an error; the others go on.
    fn fail(&mut self, index: usize, error: GenerateError, out: &mut Vec<Outcome>) {
        let member = self.running.remove(index);
        self.unpin_pictures(&member.group);
        self.counters.failed();
        out.push((member.id, EngineEvent::Failed(error)));
    }

    /// Brings the gauges up to date.
    fn count(&self) {
        let sequences = self.running.iter().map(|member| member.group.width()).sum();
        self.counters.alive(self.waiting.len(), self.running.len(), sequences);
        let lanes = self.running.iter().flat_map(|member| member.group.lanes());
        let held = lanes.map(|lane| self.model.cache_bytes(lane.fed())).sum();
        let images = (self.images.pinned_bytes(), self.images.idle_bytes());
        self.counters.bytes(held, images.0, images.1, self.prefixes.bytes());
    }
}

/// Calls the model; a panic of its is an error like others.
fn guard<T, E>(call: impl FnOnce() -> Result<T, E>) -> Result<T, GenerateError>
where
    E: std::error::Error + Send + Sync + 'static,
{
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(GenerateError::model),
        Err(panic) => Err(GenerateError::Panicked { message: panic_message(&*panic) }),
    }
}

/// The words of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

fn cancel<M: StepModel>(member: &mut Member<'_, M>, out: &mut Vec<Outcome>) {
    let mut events = Vec::new();
    member.group.cancel(&mut events);
    tell(member.id, &mut events, out);
}

fn tell(id: u64, events: &mut Vec<Event>, out: &mut Vec<Outcome>) {
    out.extend(events.drain(..).map(|event| (id, EngineEvent::Token(event))));
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
